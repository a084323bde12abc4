"""Which sample when: `sample_order`, `mixture`, `packing`, `balance`, put together in `plan`."""
