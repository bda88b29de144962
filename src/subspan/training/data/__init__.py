"""Where batches come from: documents, token streams and labelled examples."""
