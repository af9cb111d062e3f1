"""What the experiment at the top level asks beyond the design document: the verdict, its generators, pictures."""
