"""Where cubes meet torch: chips, batches and the order of samples; splits by field.

Import order: shard_index -> blocks -> reader, split -> source -> plan, targets -> labelled ->
chips -> batch, sampling -> stream; splits of sites and labels stand beside.

Nothing is imported here: torch takes seconds, and labels are split without it.
"""
