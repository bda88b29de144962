"""Fine-tuning: labelled examples of GLUE, of files or of the embedded corpus, and a pretrained model with a head."""
