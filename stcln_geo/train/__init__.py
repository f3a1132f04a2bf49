"""Pre-training, fine-tuning and evaluation.

Import order: masking, losses, classes -> config, ranks, run_directory -> memory, trackers, task ->
error_table, reconstruction, scoring -> pretrain_task, finetune_task, journal, card, evidence,
pretrain_page -> fit, temperature -> plan, start -> pretrain, finetune, protocol -> seeds,
evaluation, evaluate -> over_seeds.

Nothing is imported here: Lightning takes seconds, and evaluation does without it.
"""
