"""The synthetic tasks of RULER (arXiv 2404.06654): retrieval, tracing and counting in long text.

All text is made here; nothing is downloaded. Task definitions, templates and scores are the
paper's. What differs: the paper's essays and word lists are not here, so the haystack and the words
are those of the text that comes with Python. Scores are to compare models with, not with the
paper's tables.
"""
