"""Files, local or in an object store, read by byte ranges; and arrays that are mapped into memory."""
