"""Drop-in modules: ``veerloss.compat.<peer>`` has the names, signatures, positional order and defaults of a peer's losses, over
the functions of veerloss. None imports its peer. ``veerloss.patch`` puts them in the place of the peer's own.

Each module tells in its docstring where its values differ from the peer's and why, and which arguments take a slower path than
a kernel; and says for ``veerloss.patch``:

    PEER          the name under which the peer is imported
    DISTRIBUTION  its name on PyPI, or None for a file that projects copy
    VERSIONS      the versions whose losses are as the module has them, such as ">=0.6,<0.10"
    REPLACES      "module.path:name" in the peer to the name in the module
    METHODS       "module.path:Class.method" of models whose loss takes logits before they are upsampled, to the function of
                  the module that makes ours of theirs
    REGISTRY      "module.path:name" of what the peer builds losses by name from, if it does
"""
