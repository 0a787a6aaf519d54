"""The commands, one file each: `main(argv=None) -> int`."""
