"""One module for each format of files; each is a function from a path to rows as they stand there."""
