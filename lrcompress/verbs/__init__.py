"""What the command line and recipes do, one function per verb, over the layers below."""
