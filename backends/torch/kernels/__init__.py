"""The two recurrences: one public op each (wkv6, wkv7), with a plain form beside the kernels."""
