"""What a person meets on the terminal: flags, progress, tables, commands."""
