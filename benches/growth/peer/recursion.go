// Recursion in Go: a goroutine's stack grows by copying.
//
//	PROGRAM descent DEPTH     prints "first NS" and "repeated NS": down to DEPTH frames of 32 bytes and back, in a new goroutine
//	PROGRAM edge DEPTHS       prints "plain NS" and "worst NS": a call of a leaf from the best and from the worst of the depths 1..DEPTHS
package main

import (
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"time"
)

// 32 bytes a frame: the return address, the frame pointer, places for the callee's two arguments.
//
//go:noinline
func descend(n, step int) int {
	if n == 0 {
		return 0
	}
	return descend(n-step, step) + 1
}

//go:noinline
func inner(n, step int) int {
	return n + step
}

// Calls, so that the compiler does not leave its check out.
//
//go:noinline
func leaf(n, step int) int {
	if n < 0 {
		return inner(n, step)
	}
	return n + step
}

//go:noinline
func edge(n, calls int) int {
	if n != 0 {
		return edge(n-1, calls) + 0*n
	}
	done := 0
	for done < calls {
		done = leaf(done, 1)
	}
	return done
}

func least(n, calls, rounds int) time.Duration {
	best := time.Duration(1 << 62)
	for ; rounds > 0; rounds-- {
		begin := time.Now()
		edge(n, calls)
		if took := time.Since(begin); took < best {
			best = took
		}
	}
	return best
}

func edges(depths int) {
	const calls = 2000
	crossing := func(n, rounds int) float64 {
		return float64(least(n, calls+1, rounds)-least(n, 1, rounds)) / calls
	}
	plain, worst, where := 1e18, 0.0, 1
	for n := 1; n <= depths; n++ {
		each := crossing(n, 5)
		if each < plain {
			plain = each
		}
		if each > worst {
			worst, where = each, n
		}
	}
	// A moment that another program took is not there each time.
	worst = crossing(where, 51)
	fmt.Printf("plain %f\nworst %f\n", plain, worst)
}

func main() {
	depth := 0
	if len(os.Args) == 3 {
		depth, _ = strconv.Atoi(os.Args[2])
	}
	if depth <= 0 || (os.Args[1] != "descent" && os.Args[1] != "edge") {
		fmt.Fprintf(os.Stderr, "usage: %s descent DEPTH | edge DEPTHS\n", os.Args[0])
		os.Exit(2)
	}
	// A collection would halve the stack between the two descents.
	debug.SetGCPercent(-1)
	debug.SetMaxStack(1 << 40)
	done := make(chan struct{})
	go func() {
		if os.Args[1] == "edge" {
			edges(depth)
		} else {
			begin := time.Now()
			descend(depth, 1)
			middle := time.Now()
			descend(depth, 1)
			end := time.Now()
			fmt.Printf("first %d\nrepeated %d\n", middle.Sub(begin).Nanoseconds(), end.Sub(middle).Nanoseconds())
		}
		close(done)
	}()
	<-done
}
