"""One module per command: `add_parser(subparsers)` declares its flags, `run(args)` runs it."""
