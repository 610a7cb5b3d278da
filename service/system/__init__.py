"""The host and its network: open files, platform variables, client addresses, host names, path prefix."""
