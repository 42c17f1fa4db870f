"""Damage done to files."""


def corrupt(data, rng):
    """One of the ways in which copies and disks damage a file."""
    data, at, length = bytearray(data), rng.randrange(len(data)), rng.randrange(1, 64)
    match rng.randrange(6):
        case 0 | 1:
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 2:
            del data[at:]
        case 3:
            del data[at : at + length]
        case 4:
            data[at:at] = rng.randbytes(length)
        case 5:
            data[at : at + length] = bytes(length)
    return bytes(data)
