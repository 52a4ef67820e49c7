"""Plain functions of tensors: linear algebra, rounding, packing, random orders."""
