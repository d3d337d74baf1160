"""The web page: a face on config, data, plan, train, infer and lora, without any logic of its own. Others use
`server`, which starts it.
"""
