/* Prints what CALL, one of the drivers' exports, returns on the host. */
#include <stdint.h>
#include <stdio.h>
#include DRIVER
int main(void)
{
    printf("%d\n", (int32_t)(CALL));
    return 0;
}
