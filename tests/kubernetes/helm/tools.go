//go:build tools

// Pins Helm, which renders the chart.
package tools

import _ "helm.sh/helm/v3/cmd/helm"
