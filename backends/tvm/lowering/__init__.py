"""From a program's graph to a list of kernel calls on planned memory."""
