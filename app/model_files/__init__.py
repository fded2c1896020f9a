"""Models in: Hugging Face directories and hub ids, .gguf files, checkpoints of ours.

1. `paths` refuses a path that cannot be a model by its looks, before torch and transformers are loaded.
2. `open` finds the model and checks its configuration and tokenizer; `gguf` and `gguf_metadata` do so for GGUF files.
3. `loading` fills a model from the weights on the disk, `sharded_loading` one that is spread over ranks.
4. `generation_config` says how the model ends and draws texts, `decoding_defaults` what `layerskip tune` chose for it.
"""
