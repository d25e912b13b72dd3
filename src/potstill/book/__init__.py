"""What is told about the methods, in the terminal and on the pages, gathered from their source."""
