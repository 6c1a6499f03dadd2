from .photos import main

main()
