from megatron_dit.cli import main

if __name__ == "__main__":  # a sweep's processes import this module anew
    main()
