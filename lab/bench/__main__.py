"""`python -m lab.bench`; see `lab.bench.command`, whose functions child processes can import."""

if __name__ == "__main__":
    from util.signals import take_interrupt

    take_interrupt()  # before the imports that take seconds
    from lab.bench.children import preload_children
    from lab.bench.command import main

    preload_children()
    main()
