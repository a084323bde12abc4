"""Reading bytes: local files and object stores, kept and cached blocks, arrays mapped into memory."""
