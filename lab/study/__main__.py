"""`python -m lab.study`; see `lab.study.command`, whose functions child processes can import."""

if __name__ == "__main__":
    from util.signals import take_interrupt

    take_interrupt()  # before the imports that take seconds
    from lab.study.command import main

    main()
