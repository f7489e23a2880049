"""`python -m lab.comparison`; see `lab.comparison.command`."""

if __name__ == "__main__":
    from util.signals import take_interrupt

    take_interrupt()  # before the imports that take seconds
    from lab.comparison.command import main

    main()
