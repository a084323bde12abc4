"""From the web to documents with images.

- `members.py`, `records.py`: WARC files record by record, whatever is damaged in them
- `charset.py`: bytes of a page to text, by the rules of browsers
- `warc.py`: the step that makes documents of them
"""
