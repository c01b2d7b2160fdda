"""What runs in a model's own process: the zygote, the model process, its sandbox and its wire format.

numpy and the standard library only; never imports `gateway`.
"""
