"""Other frameworks, one file for each that needs one. Accelerate and Lightning take the optimizers as they are."""
