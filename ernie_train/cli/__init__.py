"""The command line: `main` declares the verbs, each module beside it carries out one or a few."""
