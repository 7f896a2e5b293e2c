"""One task on one model: what a method may do while it is learned, and the trainers that call it."""
