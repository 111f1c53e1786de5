package main

import (
	"fmt"
	"os"
	"sort"
	"strings"
	"sync"
	"time"
)

const ticksPerSecond = 100 // USER_HZ: what /proc counts CPU time in, on every architecture that Debian has

// result is what is printed. Times of steps are in microseconds.
type result struct {
	Mode      string          `json:"mode"`
	Clients   int             `json:"clients"`
	Count     int             `json:"count"`
	Mounting  bool            `json:"mounting"`
	Depth     int             `json:"depth"`
	Seconds   float64         `json:"seconds"`
	Rate      float64         `json:"per_second"`
	ServerCPU float64         `json:"server_cpu_seconds"`
	Steps     map[string]step `json:"steps_us"`
}

type step struct {
	Calls int     `json:"calls"`
	Mean  float64 `json:"mean"`
	Min   float64 `json:"min"`
	P50   float64 `json:"p50"`
	P99   float64 `json:"p99"`
	Max   float64 `json:"max"`
}

// times collects how long each step took, from all clients.
type times struct {
	mutex sync.Mutex
	taken map[string][]time.Duration
}

func newTimes() *times { return &times{taken: map[string][]time.Duration{}} }

// step runs and times one call. A call that failed is not counted: it ends the benchmark.
func (t *times) step(name string, call func() error) error {
	start := time.Now()
	if err := call(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	taken := time.Since(start)
	t.mutex.Lock()
	defer t.mutex.Unlock()
	t.taken[name] = append(t.taken[name], taken)
	return nil
}

func (t *times) summary() map[string]step {
	steps := map[string]step{}
	for name, taken := range t.taken {
		sort.Slice(taken, func(i, j int) bool { return taken[i] < taken[j] })
		var sum time.Duration
		for _, one := range taken {
			sum += one
		}
		at := func(quantile float64) float64 { return microseconds(taken[int(quantile*float64(len(taken)-1))]) }
		steps[name] = step{
			Calls: len(taken), Mean: microseconds(sum) / float64(len(taken)),
			Min: at(0), P50: at(0.5), P99: at(0.99), Max: at(1),
		}
	}
	return steps
}

func microseconds(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }

// cpuSeconds is the CPU time of a process and of its children that have ended; 0 for no process.
func cpuSeconds(pid int) float64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	var ticks float64
	for _, field := range fields[11:15] {
		var n float64
		fmt.Sscan(field, &n)
		ticks += n
	}
	return ticks / ticksPerSecond
}
