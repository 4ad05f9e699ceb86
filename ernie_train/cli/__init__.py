"""The command line: `main` declares the verbs, the other modules implement them."""
