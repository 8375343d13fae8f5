"""The file that holds a program: sections, checksums, the header's text (docs/format.md)."""
