"""Fine-tuning without a framework: what is asked for, the examples, and the loop; the backends do the arithmetic."""
