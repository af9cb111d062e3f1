"""Where labelled images come from: tensors, data sets and loaders, and files."""
