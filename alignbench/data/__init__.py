"""Data: one row schema and its checks, readers, prompt templates, tokenisation.

Import from the modules ``schema``, ``readers``, ``templates`` and ``tokenize``. This file imports none of
them, so that checking rows costs no import of torch, transformers or datasets.
"""
