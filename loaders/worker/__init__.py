"""Code that runs in model processes: the zygote, the model process, its sandbox and its wire format.

Imports only numpy and the standard library; never `gateway`.
"""
