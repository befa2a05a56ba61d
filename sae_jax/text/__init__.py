"""Text to read from: a corpus is made of sources, and a source gives documents.

    corpus = open_corpus(["notes.txt", "articles/", "hf:roneneldan/TinyStories"])
    for document in corpus.iterate(seed=0):
        print(document.name, len(document.text))

    a file                        gives
    *.jsonl *.ndjson, .json       a document for each line, its field `text`
      that holds lines, or .gz
    *.parquet *.arrow             one for each row, its column `text`
    any other that is UTF-8,      one; one for each MiB, or a little more, of a
      or *.txt.gz                   longer file

A folder gives all its files, whatever mixture of these they are; a folder that
`datasets` wrote by `save_to_disk` gives its tables; `hf:NAME:SPLIT:CONFIG` is read from
the Hugging Face Hub. Parquet, Arrow and the Hub want the extra `text`.

A document is named by its file's path below what was given, and the number from 1 of
the line, row or MiB: `wiki/part-3.jsonl.gz:17`. A line or row without text is an error.
"""

from sae_jax.text.corpus import Corpus, corpus_of, open_corpus, read_documents
from sae_jax.text.library import read_standard_library, standard_library
from sae_jax.text.source import Document, hash_name, is_heldout

__all__ = [
    "Corpus",
    "Document",
    "corpus_of",
    "hash_name",
    "is_heldout",
    "open_corpus",
    "read_documents",
    "read_standard_library",
    "standard_library",
]
