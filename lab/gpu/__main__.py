"""`python -m lab.gpu`; see `lab.gpu.command`."""

if __name__ == "__main__":
    from lab.gpu.command import main

    main()
