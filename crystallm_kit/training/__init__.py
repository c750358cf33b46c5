"""What a run is: one loop for models from scratch, LoRA and QLoRA, on one process or many."""
