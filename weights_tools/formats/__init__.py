"""The file formats that weights are kept in."""
