from megatron_dit.cli import main

if __name__ == "__main__":  # the processes that a sweep starts import this module again
    main()
