"""Training data: text becomes one stream of tokens (`store`), samples are drawn from it in one seeded order (`order`)."""
