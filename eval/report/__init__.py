"""What an evaluation leaves behind: tables, files and pictures."""
