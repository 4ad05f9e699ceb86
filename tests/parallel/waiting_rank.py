"""A rank that waits for scripts: `waiting_rank.py ADDRESS`."""

import os
import sys

import paddle

import tests.parallel.scenario  # noqa: F401
from ernie_train.kernels import describe_kernels
from tests.waiting import serve

if __name__ == "__main__":
    describe_kernels()  # loads them, for two seconds
    assert not paddle.distributed.is_initialized()
    serve(sys.argv[1], int(os.environ["PADDLE_TRAINER_ID"]))
