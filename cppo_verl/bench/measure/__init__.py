"""What is timed: for each part a function that builds a cell's inputs and returns the functions to time."""
