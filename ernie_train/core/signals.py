"""The processor, the device and the signals of this process.

`configure_process` runs when `ernie_train` is imported, before Paddle is. It never overrides what
the user set in the environment, and it keeps a record that `doctor` and `environment.json` show.

What it sets was measured with paddlepaddle 3.3.1 (CPU wheel) on two cores of an AMD EPYC (Zen 5):

- MKL_DEBUG_CPU_TYPE=5, on AMD only: a 2048 x 2048 fp32 matmul on one thread went from 20 to
  80-120 GFLOP/s. The wheel's old MKL takes a slow path on processors that are not Intel's.
- MKL_NUM_THREADS: the same matmul went from 80 to 150 GFLOP/s with two threads. OMP_NUM_THREADS
  does the same, but Paddle warns on stderr when it is above 1, and no elementwise operator ran
  faster with it; FLAGS_paddle_num_threads changed nothing. So OMP_NUM_THREADS is set to 1, which
  is what Paddle itself does when it is unset.
- OPENBLAS_NUM_THREADS: the same number for numpy's matrix products; it would follow
  OMP_NUM_THREADS otherwise. Sampling gains little from it, and forks as many processes instead.
- glibc's mallopt, so that freed memory is used again instead of going back to the system: Paddle
  asks the system for every larger tensor, and its pages are cleared each time. Multiplying a
  tensor of 8 MB went from 22 to 4 ms, softmax of 32 MB from 41 to 11 ms. Memory that was used once
  stays with the process; its peak grew by about a tenth. Paddle's own pool
  (FLAGS_allocator_strategy=naive_best_fit) gained nothing.
"""

import signal
from types import FrameType, TracebackType
from typing import Any


class StopFlag:
    """Notes SIGTERM and SIGINT while it is entered; work asks `requested` where it can stop.

    A second SIGINT raises KeyboardInterrupt at once, for the impatient. Flags nest: an inner one
    passes what it got on to those around it, and each restores the handlers that it found.

        with StopFlag() as stop:
            while not stop.requested: ...
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    _entered: "list[StopFlag]" = []  # the stack of all flags, shared on purpose

    def __init__(self) -> None:
        self.signal_name = ""
        self._interrupts = 0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return bool(self.signal_name)

    def request(self, signal_name: str) -> None:
        """Asks for a stop without a signal, for instance because another rank got one."""
        self.signal_name = self.signal_name or signal_name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        for flag in StopFlag._entered:
            flag.request(signal.Signals(number).name)
            flag._interrupts += number == signal.SIGINT
        if number == signal.SIGINT and self._interrupts > 1:
            raise KeyboardInterrupt

    def __enter__(self) -> "StopFlag":
        if StopFlag._entered:
            self.signal_name = StopFlag._entered[-1].signal_name
            self._interrupts = StopFlag._entered[-1]._interrupts
        StopFlag._entered.append(self)
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        # A rank is started with these blocked, lest one comes before anybody listens: now is when.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()
        StopFlag._entered.remove(self)
