"""Where examples come from: rows, chat encoding, corpora, the resumable loader, micro-batches."""
