"""The model side: Megatron-Core's GPT with tree attention and a head on response rows."""
